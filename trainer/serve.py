"""Serve a trained model: an OpenAI-compatible HTTP endpoint, and a page to try it.

    python -m trainer.serve s3://bucket/runs/first

Reads a run's newest checkpoint, one checkpoint, or a public model. Listens on loopback; any other address needs
SERVE_API_KEY in the environment. Ends with 0 on SIGINT and SIGTERM.
"""

from core.console import run_entry
from trainer.inference.start import serve

if __name__ == "__main__":
    run_entry(serve)
