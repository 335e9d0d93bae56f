"""What this project's parts cost, measured beside their peers: `python launch/benchmark COMMAND`, see README.md."""
