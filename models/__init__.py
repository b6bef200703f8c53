"""The network and everything it needs: phantoms, preprocessing, training, explanation, calibration, export, delta codec, bundle.

Reads and writes arrays and bundle files. torch is imported only by `network`, `training` and `export`,
which run in child processes of box and hub; everything else works with numpy alone.
Never imports `edge_agent`, `cloud_hub` or `fleet_link`.
"""
