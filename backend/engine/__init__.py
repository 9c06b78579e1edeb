"""The engine process: its loop, the socket that doors talk to it through, and the launcher that owns it."""
