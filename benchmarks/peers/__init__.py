"""loramux beside PEFT, `transformers serve` and vLLM; started by `run.py`, described in `compare.py`."""
