"""The op table: each op's contract, its plain torch reference, its Triton-language kernel."""
