import os
import site

for folder in filter(None, os.environ.get("TURBOTRITON_SITE", "").split(os.pathsep)):
    site.addsitedir(folder)

from turbotriton.backend.tritonserver.text_door import TritonPythonModel  # noqa: E402, F401
