"""Changes of the database's tables, oldest first in versions/. `raysd.database` runs them; nothing else has to."""
