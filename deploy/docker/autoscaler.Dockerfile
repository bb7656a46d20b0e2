# The autoscaler, with the actuator for Kubernetes: no torch, no tokenizer.
#
#   docker build -f deploy/docker/autoscaler.Dockerfile -t paceline-autoscaler .

FROM python:3.12-slim AS build
RUN python -m venv /opt/paceline
WORKDIR /src
COPY . .
RUN /opt/paceline/bin/pip install --no-cache-dir ./client '.[autoscaler,kubernetes]'

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 paceline
COPY --from=build /opt/paceline /opt/paceline
ENV PATH=/opt/paceline/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
# KEDA asks here, where the scaling file says so; health answers there too.
EXPOSE 50071
# Ending it changes nothing: executors stay as they are until it is back.
ENTRYPOINT ["paceline", "autoscaler"]
CMD ["run", "/etc/paceline/scaling.yaml"]
