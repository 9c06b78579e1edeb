"""How the bundled checkpoint is made: corpus, tokenizer, training, evaluation. Nothing at run time imports this package."""
