"""What talks to a running tritonserver: Python client, terminal chat, web demo."""
