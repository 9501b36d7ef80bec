# CPU: docker build -t gptjax .
# NVIDIA GPU: docker build --build-arg EXTRAS=cuda13 -t gptjax .
# docker run --rm -it [--gpus all] -v "$PWD:/work" gptjax train --data.path corpus/ --size small
FROM python:3.12-slim
ARG EXTRAS=report
# A C++ compiler, for gptjax's own kernels on CPUs; the programs run as a user without rights.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home gptjax
COPY . /src
RUN pip install --no-cache-dir "/src[${EXTRAS}]"
USER gptjax
WORKDIR /work
ENTRYPOINT ["gptjax"]
CMD ["--help"]
