"""The room of the servers: engine, routes, the life of lessons. Heavy; import the modules.

`engine` generates; `home` owns the directory; `log` is the history of lessons; `trainer` is the far process's
near side; `judge` asks probes; `keeper` leads each lesson through its life; `routes` is HTTP; `local` puts it
together and runs it.
"""
