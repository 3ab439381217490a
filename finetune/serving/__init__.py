"""Trained adapters over HTTP on one machine: `finetune serve`. Needs the extra `finetune[serve]`."""
