# tritonserver with turbotriton installed. The workspace is mounted, not baked in:
#   docker build -t turbotriton .
#   docker run --gpus all --shm-size=1g -p 8000-8002:8000-8002 -v $PWD/workspace:/workspace:ro turbotriton
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3

FROM ${TRITON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md ./
COPY src src
COPY backend backend
COPY converter converter
COPY client client
COPY quant quant
COPY model_repository model_repository
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${TRITON_IMAGE}
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /tmp/wheels
RUN python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt /tmp/wheels/turbotriton-*.whl \
    && rm -r /tmp/wheels /tmp/constraints.txt
# triton-server in the base image; by number, so that Kubernetes can see that it is not root
USER 1000
# away from any folder named like a package: stubs put the working directory first on sys.path
WORKDIR /
ENV MODEL_NAME=turbomind
EXPOSE 8000 8001 8002
# ready means that this model answers, not only that the server lives
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["bash", "-c", "curl --fail --silent --output /dev/null http://localhost:8000/v2/models/${MODEL_NAME}/ready"]
ENTRYPOINT ["turbotriton", "serve", "tritonserver", "--host", "0.0.0.0"]
CMD ["/workspace"]
