"""The contract between box and hub: what both say, sign, seal and chunk.

Reads and writes bytes only; `bus` holds the one socket (MQTT 5 over TLS 1.3).
Never imports `edge_agent`, `cloud_hub` or `models`.
"""
