"""The store: what the server must not forget.

`base` is the seam that a database driver implements, `sqlite` the embedded driver, `schema` the tables,
`migrations` how they came to be. The other modules hold the statements, one module per kind of thing: plain
functions that take a connection, so that any of them can stand together in one transaction.
"""
