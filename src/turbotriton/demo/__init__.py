"""The bundled demo model: a tiny chat checkpoint in Hugging Face layout, and where to find it."""
