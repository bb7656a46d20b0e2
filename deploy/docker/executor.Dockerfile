# The executor, and `paceline prepare`, which needs the same libraries.
#
#   docker build -f deploy/docker/executor.Dockerfile -t paceline-executor .
#
# Build arguments:
#   TORCH          which torch to install
#   TORCH_INDEX    package index to take torch from: PyTorch has one with builds for CPUs, which make the image some
#                  gigabytes smaller. Empty: pip's own index, whose builds for Linux bring CUDA with them.

FROM python:3.12-slim AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
RUN python -m venv /opt/paceline
# First and apart: it is large and seldom changes. The constraints keep every later package from replacing it.
RUN /opt/paceline/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" \
    && /opt/paceline/bin/pip list --format=freeze | grep '^torch==' | cut -d+ -f1 > /opt/constraints.txt
WORKDIR /src
COPY . .
RUN /opt/paceline/bin/pip install --no-cache-dir -c /opt/constraints.txt ./client '.[executor]'

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 paceline && install -d -o paceline /models
COPY --from=build /opt/paceline /opt/paceline
# Prepared models go to the volume, so that scheduler and executors open the same folder.
ENV PATH=/opt/paceline/bin:$PATH PYTHONUNBUFFERED=1 PACELINE_CACHE=/models
USER 10001
VOLUME /models
EXPOSE 50061
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["paceline", "health", "localhost:50061"]
ENTRYPOINT ["paceline"]
CMD ["executor", "--listen", "0.0.0.0:50061"]
