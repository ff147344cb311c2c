# The image of one node: `docker build -t mehdb:0.1.0 .`
#
# BASE may be any image with Python 3.11 or newer and glibc, called `python3`, with the `venv` module.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# Two environments: what builds (pip and the build backend) stays behind, what runs is copied to the final stage.
RUN python3 -m venv /build && python3 -m venv --without-pip /opt/mehdb
WORKDIR /source
# The dependencies first: a change of the code alone reuses their layer. Wheels only, so no build tools are needed.
COPY requirements.lock requirements-build.lock ./
RUN /build/bin/pip install --only-binary :all: --require-hashes -r requirements-build.lock \
 && /build/bin/pip --python /opt/mehdb/bin/python install --no-compile --only-binary :all: --require-hashes \
    -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY mehdb mehdb
# The bytecode is made here, as nothing can write it later. Unchecked: whatever happens to time stamps in copies of the
# image, it is never compiled again.
RUN /build/bin/pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /wheels . \
 && /build/bin/pip --python /opt/mehdb/bin/python install --no-compile --no-deps --no-index /wheels/* \
 && /opt/mehdb/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/mehdb/lib

FROM ${BASE}
LABEL org.opencontainers.image.title="mehdb" \
      org.opencontainers.image.description="A replicated key-value store on a Kubernetes StatefulSet" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/mehdb /opt/mehdb
# The path of the Go mehdb's manifest. Owned by the user below, and open to group 0, which an arbitrary user ID (as
# OpenShift gives) belongs to: a new volume of Docker or Podman takes this directory's owner and mode.
RUN mkdir /mehdbdata && chown 10001:0 /mehdbdata && chmod 770 /mehdbdata
# Slim images come without the bytecode of Python's own library. Importing it once as root writes what mehdb uses of it.
RUN /opt/mehdb/bin/mehdb serve --help > /dev/null
ENV PATH=/opt/mehdb/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    MEHDB_DATADIR=/mehdbdata
EXPOSE 9876
# By number, so that the kubelet can tell that it is not root (runAsNonRoot).
USER 10001:10001
ENTRYPOINT ["mehdb"]
CMD ["serve"]
