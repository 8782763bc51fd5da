"""To and from other tools: rows in their forms, and stores and adapters on the hub."""
