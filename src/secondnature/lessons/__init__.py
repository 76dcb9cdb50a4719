"""The room of what changes the weights: home, log, ledger, the life of a lesson (server; no HTTP).

`home` owns the directory; `log` is the history of lessons; `ledger` what people corrected; `planner` turns a
request into a `plan`, its `encoder` corrections into token ids; `trainer` is the far process's near side; `prober`
asks probes and `own_answers` what the model itself says; `runner` leads each lesson through its life; `teaching`
puts them together. Heavy; import the modules.
"""
