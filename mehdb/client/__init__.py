"""`mehdb` as a client: reads and writes keys, carries folders in and out, and shows the state of a whole cluster.

It talks to nodes by the public HTTP API alone, as any other client could, and never touches a data directory. Only
`client.http` knows httpx. What a node answers is shown as it said it: this package judges no node's health or data.
"""
