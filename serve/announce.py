"""Tell people what the service did by itself: a line in the log, and a webhook if one is set."""

from __future__ import annotations

import asyncio
import logging

import httpx

logger = logging.getLogger(__name__)

TRIES = 3
RETRY_S = 2.0
TIMEOUT_S = 5.0


async def announce(event: dict[str, object], webhook_url: str) -> None:
    """POST the event as JSON; an answer that is no success is tried again, then logged."""
    logger.warning("announcement: %s", event)
    if not webhook_url:
        return
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        for attempt in range(1, TRIES + 1):
            try:
                (await client.post(webhook_url, json=event)).raise_for_status()
            except httpx.HTTPError as error:
                logger.warning("webhook, try %d of %d: %s", attempt, TRIES, error)
                await asyncio.sleep(RETRY_S)
            else:
                return
