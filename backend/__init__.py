"""The engine behind tritonserver: doors, engine process, scheduler, runner, decoder, ops. README.md walks the path of a request."""
