# One image for worker, HTTP API, migration and command line. torch comes first and with CUDA.
FROM python:3.11-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH="torch==2.13.0"
RUN pip install --no-cache-dir "${TORCH}"
WORKDIR /app
COPY pyproject.toml README.md ./
COPY contract contract
COPY producer producer
COPY worker worker
COPY kernels kernels
COPY migrations migrations
RUN pip install --no-cache-dir ".[worker,postgres,s3,server,tables]" \
    && useradd --create-home lorabatch \
    && mkdir /data && chown lorabatch /data
USER lorabatch
ENV LORABATCH_HOME=/data
CMD ["lorabatch-worker"]
