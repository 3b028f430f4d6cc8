"""The processes: Ray actors around vLLM, reward functions and DeepSpeed."""
