"""The step of a decoder-only transformer in C++, built where it first runs. What cannot have it runs in torch."""
