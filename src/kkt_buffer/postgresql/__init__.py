"""The PostgreSQL backend, for those who outgrow one machine. Imported only for a URL of PostgreSQL."""
