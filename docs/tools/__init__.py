"""Makes what is generated of the pages: tables from the code, pictures, the site."""
