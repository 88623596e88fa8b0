"""What faces vLLM: the plugin, its configuration, scheduling, model state and sampler."""
