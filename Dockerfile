# syntax=docker/dockerfile:1
#
#   docker build --tag headstock:0.1.0 .                                       serving, on a CPU
#   docker build --tag headstock:0.1.0-cuda --build-arg EXTRAS="--extra gpu" . serving, with CUDA
#   docker build --tag headstock-learn:0.1.0 --target learning .               learning and exporting
#
# CUDA's libraries come as Python packages, so both builds stand on one base. The tags are exact; a
# release pins them by the digests that it has pulled: --build-arg PYTHON_IMAGE=…@sha256:….
ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.13.0

FROM ${UV_IMAGE} AS uv


FROM ${PYTHON_IMAGE} AS base
# KubeRay starts Ray by bash and probes by wget; the health check below does too.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home headstock


FROM base AS install
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PROJECT_ENVIRONMENT=/opt/headstock \
    UV_PYTHON_DOWNLOADS=never \
    UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1
ARG EXTRAS=""
WORKDIR /src
# Dependencies are a layer of their own; pyproject.toml pins them, so no lock file is needed.
COPY pyproject.toml README.md LICENSE ./
RUN uv sync --no-default-groups --no-install-project ${EXTRAS}
COPY models models
COPY export export
COPY serve serve
RUN uv sync --no-default-groups --no-editable ${EXTRAS}
# What `headstock serve` writes anew at each start; in a pod, Ray is started by KubeRay.
RUN /opt/headstock/bin/python -c "from pathlib import Path; from serve.runtime import write_launcher; write_launcher(Path('/opt/headstock'))"
COPY image/licences.py image/licences.py
RUN /opt/headstock/bin/python image/licences.py > /opt/headstock/LICENCES.md


FROM install AS install-learning
RUN uv sync --no-default-groups --no-editable --extra learn ${EXTRAS}
RUN /opt/headstock/bin/python image/licences.py > /opt/headstock/LICENCES.md


FROM base AS learning
COPY --from=install-learning /opt/headstock /opt/headstock
ENV PATH=/opt/headstock/bin:${PATH} HOME=/tmp
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["headstock"]


FROM base AS serving
COPY --from=install /opt/headstock /opt/headstock
# KubeRay waits for the head by a login shell, which forgets the PATH that is set here.
RUN ln -s /opt/headstock/bin/headstock /opt/headstock/bin/ray /usr/local/bin/
# The root file system may be read-only; what is written lies in /tmp and /dev/shm.
ENV PATH=/opt/headstock/bin:${PATH} HOME=/tmp HEADSTOCK_HOST=0.0.0.0
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["wget", "--quiet", "--output-document=/dev/null", "http://127.0.0.1:8000/v2/health/ready"]
ENTRYPOINT ["headstock"]
CMD ["serve"]
