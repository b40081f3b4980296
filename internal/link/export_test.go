package link

import (
	"context"
	"net"
)

// DialingVsock returns o with another way to reach a CID.
func (o Options) DialingVsock(dial func(ctx context.Context, cid uint32) (net.Conn, error)) Options {
	o.vsock = dial
	return o
}
