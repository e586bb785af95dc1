"""Knowledge on disk: Parquet parts and a manifest; read, written, dated, compressed, shown."""
