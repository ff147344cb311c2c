# The image of one node: `docker build -t mehdb:0.1.0 .`
#
# BASE may be any image with Python 3.11 or newer and glibc, called `python3`, with the `venv` module. VERSION is what the
# image calls itself: the build fails if the package says otherwise. REVISION is the commit, for those who ask the image.
ARG BASE=python:3.13-slim
ARG VERSION=0.1.0
ARG REVISION=unknown

FROM ${BASE} AS build
ARG VERSION
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
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
RUN /build/bin/pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /wheels . \
 && /build/bin/pip --python /opt/mehdb/bin/python install --no-compile --no-deps --no-index /wheels/* \
 && test "$(/opt/mehdb/bin/mehdb --version)" = "mehdb ${VERSION}"
# What packages bring that nothing runs: their tests, and the sources of what is compiled. Each package's dist-info stays,
# with its name, version and licence: that is where tools that list an image's contents find it. The bytecode is made here,
# as nothing can write it later. Unchecked: whatever happens to time stamps in copies of the image, it is never made again.
RUN cd /opt/mehdb/lib/python3*/site-packages && rm -r ./*/tests \
 && find . \( -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.pyi' -o -name '*.[ch]' \) -delete \
 && /opt/mehdb/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/mehdb/lib

FROM ${BASE}
ARG BASE
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="mehdb" \
      org.opencontainers.image.description="A replicated key-value store on a Kubernetes StatefulSet" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}" \
      org.opencontainers.image.licenses="Apache-2.0"
# A container that runs has nothing to install: pip, and what would bring it back, are no part of it.
RUN find / -xdev \( -path '*-packages/pip' -o -path '*-packages/pip-*' -o -path '*/bin/pip*' -o -name ensurepip \
      -o -name python-wheels \) -prune -exec rm -r {} +
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
