# One image for every role: `tandem router`, `tandem serve`, and the Ray nodes that hold the workers.
# It runs on CPUs and on CUDA. For a small CPU-only image, name PyTorch's CPU package index:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=… -t tandem:0.1.0 .
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG PIP_EXTRA_INDEX_URL=
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL}
RUN python -m venv /opt/tandem
COPY . /source
RUN /opt/tandem/bin/pip install "/source${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON}-slim
# Triton needs a compiler where its kernels run.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home tandem
COPY --from=build /opt/tandem /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /home/tandem
EXPOSE 8000
CMD ["tandem", "serve", "--host", "0.0.0.0"]
