"""`pipeline(...)`: a model in the caller's process, from a path or hub id to answers. Read in this order:

| file | what it knows |
|---|---|
| `options.py` | the dataclasses of the public calls: engine and generation options, `Response` |
| `model_files.py` | where weights and tokenizer lie; a checkpoint becomes a workspace in the cache first |
| `engine_thread.py` | the engine on a thread of this process; deltas to whoever asked |
| `prompts.py` | what a caller may pass as prompts; text and messages to token ids |
| `answer.py` | one answer as it grows: token ids to text, stop words, counts |
| `inference.py` | `Pipeline`: many prompts through the engine, bounded; streams, sessions, asyncio |
"""
