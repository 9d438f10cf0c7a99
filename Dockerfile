# The service in a container, see docs/service.md.
#     docker build -t horizonplan .
FROM python:3.11-slim

# An index where pip looks for torch besides its own: one of builds without CUDA makes the image far smaller.
ARG TORCH_INDEX=

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY horizonplan /src/horizonplan
RUN cd /src && pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt '.[hugging-face,postgresql]'

# Docker gives a new volume the owner of the folder that it covers.
RUN useradd --system --uid 10001 --home-dir /data horizonplan && install -d -o horizonplan -m 700 /data
USER horizonplan
WORKDIR /data
VOLUME /data
ENV HORIZONPLAN_DATABASE_URL=sqlite:////data/horizonplan.sqlite3

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["horizonplan"]
CMD ["serve", "--host", "0.0.0.0"]
