"""`APIClient` without a server: what it takes for an address."""

import pytest

from turbotriton.client.api_client import APIClient
from turbotriton.contract.errors import InvalidInputError


@pytest.mark.parametrize(
    "url",
    [
        "localhost:23333",
        "ftp://a:1",
        "http://",
        "http://a b:1",
        "http://localhost:1x",
        "http://localhost:0",
        "http://localhost:99999",
    ],
)
def test_an_address_that_is_no_url_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(InvalidInputError, match="is no http:// or https:// URL") as refused:
        APIClient(url)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://localhost:23333", "https://models.example/v1/", "http://[::1]:8080"])
def test_other_addresses_are_taken(url: str) -> None:
    APIClient(url).close()
