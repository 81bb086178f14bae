"""Write all golden files anew."""

from golden.kubernetes import all_files

for path, content in all_files():
    path.write_text(content)
    print(path)
