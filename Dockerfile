# A CPU image of glmq, for x86_64 and aarch64; with BASE an image that has CANN and torch_npu, whose torch stays.
ARG BASE=python:3.11-slim
FROM ${BASE}
USER root
RUN command -v gcc || (apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*)
COPY . /src
# Where the base has a torch already, pip is told to leave that very version alone, and NumPy below 2, as CANN up to 8.5 needs.
RUN python -m pip list --format=freeze | grep -E '^torch(-npu|_npu)?==' > /tmp/installed.txt || true \
    && if python -m pip list --format=freeze | grep -q '^numpy==1\.'; then echo 'numpy<2' >> /tmp/installed.txt; fi \
    && if [ -s /tmp/installed.txt ]; then python -m pip install --no-cache-dir -c /tmp/installed.txt /src; \
       else python -m pip install --no-cache-dir -c /src/constraints.txt /src; fi \
    && rm -r /src
ENTRYPOINT ["glmq"]
