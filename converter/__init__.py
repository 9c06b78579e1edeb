"""From a checkpoint to a workspace that tritonserver serves."""
