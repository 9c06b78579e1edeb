"""The engine behind tritonserver: doors, engine process, scheduler, runner, decoder, ops (README.md: the path of a request)."""
