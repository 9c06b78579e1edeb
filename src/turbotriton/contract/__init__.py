"""What every other folder agrees on: formats, tensor names, dataclasses, errors. Standard library only."""
