"""What owners did."""

from codex_proxy.ledger import queries
from codex_proxy.server.gateway.desk import Call, Desk, moment
from codex_proxy.server.gateway.shapes import Audit, AuditQuery, AuditRow, Nothing


async def list_audit(desk: Desk, call: Call[AuditQuery, Nothing]) -> Audit:
    """List what owners did."""
    query = call.query
    page = await desk.ledger.read(
        lambda connection: queries.audit_page(
            connection, actor=query.actor, target=query.target, limit=query.limit, before=query.before
        )
    )
    return Audit(
        entries=[
            AuditRow(
                id=str(one.id),
                at=moment(one.at),
                actor=one.actor,
                action=one.action,
                target=one.target,
                before=one.before,
                after=one.after,
            )
            for one in page.rows
        ],
        next=page.next,
    )
