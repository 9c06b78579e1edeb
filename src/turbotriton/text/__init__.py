"""Text around token ids, shared by doors, clients and pipeline: chat templates, incremental detokenisation, stop words."""
