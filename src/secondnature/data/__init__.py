"""The room of the data: the ledger of corrections, and how corrections become batches of token ids.

Modules: `ledger` (what people said, durable), `examples` (corrections -> token ids), `replay` (the mix against
forgetting).
"""
