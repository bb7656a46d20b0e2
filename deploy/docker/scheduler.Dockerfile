# The scheduler: no torch, no transformers.
#
#   docker build -f deploy/docker/scheduler.Dockerfile -t paceline-scheduler .

FROM python:3.12-slim AS build
RUN python -m venv /opt/paceline
WORKDIR /src
COPY . .
RUN /opt/paceline/bin/pip install --no-cache-dir ./client '.[scheduler]'

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 paceline && install -d -o 10001 /journal
COPY --from=build /opt/paceline /opt/paceline
ENV PATH=/opt/paceline/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["paceline", "health", "localhost:50051"]
# SIGTERM drains: running requests finish first, for --drain-timeout. With --journal /journal/journal.db on a volume that
# can be 0: the next start goes on with them.
ENTRYPOINT ["paceline", "scheduler"]
CMD ["--listen", "0.0.0.0:50051"]
