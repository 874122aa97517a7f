# The server: NVIDIA's Triton Inference Server with tritonmind as one more backend.
#   docker build -t tritonmind:0.1.0 .
#   bash service_docker_up.sh --docker WORKSPACE
#
# 26.04 is the first release whose readiness endpoint counts a model's own is_ready. Its Python is 3.12, and it takes
# response parameters (25.02) and reads strings fast (25.10).
FROM nvcr.io/nvidia/tritonserver:26.04-py3 AS base

# The image's Python belongs to its distribution, and the server's stub is linked against it: no virtual environment.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS wheel
COPY setup.cfg pyproject.toml README.md LICENSE service_docker_up.sh /source/
COPY backend /source/backend
COPY tools /source/tools
COPY model_repository /source/model_repository
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM base
# Triton (the language) compiles its launchers at run time: it needs a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
 && rm -rf /var/lib/apt/lists/*

# The wheel comes last, so that a change of the code does not download PyTorch again.
RUN python3 -m pip install --no-cache-dir "torch==2.13.0" "numpy<2" "tritonclient[grpc]>=2.50" "llguidance>=1.9,<2" \
    "sentencepiece>=0.2" "tiktoken>=0.7"
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir "numpy<2" /wheels/tritonmind-*.whl

# The adapter is taken from the installed package, the one copy of the code in this image: the two cannot differ.
RUN install -D --mode=644 \
    "$(python3 -c 'from tritonmind.resources import resource; print(resource("backend/model.py"))')" \
    /opt/tritonserver/backends/tritonmind/model.py

# Compiled kernels; a volume keeps them for the next container.
ENV TRITON_CACHE_DIR=/var/cache/tritonmind/triton
VOLUME /var/cache/tritonmind

# Created by whoever stops the server, before SIGTERM:
#   docker exec CONTAINER sh -c 'touch "$TRITONMIND_DRAIN_FILE"'
# A container that is started again, not made anew (docker run --rm), keeps the file and refuses requests: remove it.
ENV TRITONMIND_DRAIN_FILE=/tmp/tritonmind-drain

# Empty: the server's Python stub would import a model.py of its working directory before the backend's.
WORKDIR /srv/empty

EXPOSE 33337 33338 33339
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m \
    CMD ["python3", "-c", "from tritonclient.grpc import InferenceServerClient as C; raise SystemExit(not C('127.0.0.1:33337').is_model_ready('tritonmind', client_timeout=5))"]
CMD ["tritonserver", "--model-repository=/workspace/model_repository", "--grpc-port=33337", "--http-port=33338", "--metrics-port=33339", "--exit-timeout-secs=8"]
