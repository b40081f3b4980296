package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// dialTimeout bounds a connection to a port of the guest itself.
const dialTimeout = 5 * time.Second

// serveTCP connects the caller to a TCP port of the guest, by an upgrade of the
// connection; api/agentiso/guest/v1 says how. Only HTTP/1.1 can be upgraded.
func (s *Server) serveTCP(w http.ResponseWriter, r *http.Request) {
	addr, err := tcpAddress(r)
	if err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), dialTimeout)
	defer cancel()
	var d net.Dialer
	port, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		writeError(w, http.StatusBadGateway, err.Error())
		return
	}
	defer port.Close()
	link, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		writeError(w, http.StatusHTTPVersionNotSupported, "this connection cannot be upgraded: "+err.Error())
		return
	}
	defer link.Close()
	if !s.track(link, port) {
		return
	}
	defer s.untrack(link, port)
	// net/http leaves the deadline of the request's headers behind.
	if err := link.SetDeadline(time.Time{}); err != nil {
		return
	}
	const answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
	if _, err := io.WriteString(link, answer); err != nil {
		return
	}
	splice(link, rw.Reader, port)
}

func tcpAddress(r *http.Request) (string, error) {
	if !headerHas(r.Header["Connection"], "upgrade") || !headerHas(r.Header["Upgrade"], "tcp") {
		return "", errors.New(`"Connection: Upgrade" and "Upgrade: tcp" are required`)
	}
	q := r.URL.Query()
	port, err := strconv.ParseUint(q.Get("port"), 10, 16)
	if err != nil || port == 0 {
		return "", fmt.Errorf("port %.16q is not between 1 and 65535", q.Get("port"))
	}
	host := q.Get("host")
	switch {
	case host == "":
		host = "127.0.0.1"
	case host == "localhost" || net.ParseIP(host) != nil:
	default:
		return "", fmt.Errorf("host %.64q is not an IP address", host)
	}
	return net.JoinHostPort(host, strconv.FormatUint(port, 10)), nil
}

func headerHas(values []string, want string) bool {
	for _, v := range values {
		for f := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(f), want) {
				return true
			}
		}
	}
	return false
}

// track takes the streams into the server's care; it fails once that is closed.
func (s *Server) track(conns ...net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	for _, c := range conns {
		s.tunnels[c] = struct{}{}
	}
	s.wg.Add(1)
	return true
}

func (s *Server) untrack(conns ...net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range conns {
		delete(s.tunnels, c)
	}
	s.wg.Done()
}

// spliceBuffer is one direction's buffer.
const spliceBuffer = 64 << 10

// splice copies both ways until both have ended. The end of one direction is
// passed on as a half-close; where the receiver has none, everything ends.
// fromLink holds what was read of link already.
func splice(link net.Conn, fromLink *bufio.Reader, port net.Conn) {
	in := make(chan struct{})
	go func() {
		defer close(in)
		copyStream(port, fromLink, link)
	}()
	copyStream(link, port, port)
	<-in
}

// copyStream copies src, which is read from srcConn, to dst.
func copyStream(dst net.Conn, src io.Reader, srcConn net.Conn) {
	_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, spliceBuffer))
	if c, ok := dst.(interface{ CloseWrite() error }); ok && err == nil {
		if c.CloseWrite() == nil {
			return
		}
	}
	dst.Close()
	srcConn.Close()
}
