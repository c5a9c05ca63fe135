"""Serving: a version in the registry answers over HTTP, batched by denoising step."""
