package client

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// DialTCP connects to a TCP port inside a running workspace, with or without a
// network. host is where the agent connects to; "" is the workspace itself.
// ctx bounds the connecting only. The connection has CloseWrite, and ends when
// the workspace or the daemon does.
func (c *Client) DialTCP(ctx context.Context, ref string, port uint16, host string) (net.Conn, error) {
	doing := "connecting to port " + strconv.Itoa(int(port)) + " of " + ref
	conn, err := c.transport.DialContext(ctx, "unix", c.socket)
	if err != nil {
		return nil, c.failed(ctx, doing, err)
	}
	interrupt := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	t, err := c.upgrade(ctx, conn, ref, port, host)
	if !interrupt() {
		err = errors.Join(context.Cause(ctx), err)
	}
	if err != nil {
		_ = conn.Close()
		return nil, c.failed(ctx, doing, err)
	}
	return t, nil
}

func (c *Client) upgrade(ctx context.Context, conn net.Conn, ref string, port uint16, host string) (net.Conn, error) {
	q := url.Values{"port": {strconv.Itoa(int(port))}}
	if host != "" {
		q.Set("host", host)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, agentURL(ref)+"/tcp?"+q.Encode(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "tcp")
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		defer res.Body.Close()
		e := fromHTTP("connecting to port "+strconv.Itoa(int(port))+" of "+ref, res)
		return nil, e
	}
	return &tunnel{Conn: conn, r: br}, nil
}

// tunnel reads first what came with the answer.
type tunnel struct {
	net.Conn
	r *bufio.Reader
}

func (t *tunnel) Read(p []byte) (int, error) { return t.r.Read(p) }

// CloseWrite tells the other end that nothing more comes.
func (t *tunnel) CloseWrite() error {
	if c, ok := t.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return net.ErrClosed
}
