package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Route is a default route of the main table.
type Route struct {
	Index   int // of the interface; 0 if it has several
	Gateway netip.Addr
	Metric  uint32

	data []byte // as the kernel told it
}

// DefaultRoutes returns the unicast default routes of the main table for the
// family of like.
func (c *Conn) DefaultRoutes(like netip.Addr) ([]Route, error) {
	body := make([]byte, unix.SizeofRtMsg)
	body[0] = family(like)
	list, err := c.dump(unix.RTM_GETROUTE, body)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var routes []Route
	for _, m := range list {
		if r, ok := parseRoute(m); ok && m.data[0] == family(like) {
			routes = append(routes, r)
		}
	}
	return routes, nil
}

func parseRoute(m message) (r Route, ok bool) {
	if m.kind != unix.RTM_NEWROUTE || len(m.data) < unix.SizeofRtMsg {
		return r, false
	}
	// Family, destination bits, source bits, TOS, table, protocol, scope, type.
	if m.data[1] != 0 || m.data[7] != unix.RTN_UNICAST {
		return r, false
	}
	table := uint32(m.data[4])
	for typ, v := range attributes(m.data[unix.SizeofRtMsg:]) {
		switch {
		case typ == unix.RTA_GATEWAY:
			r.Gateway, _ = netip.AddrFromSlice(v)
		case len(v) < 4:
		case typ == unix.RTA_OIF:
			r.Index = int(int32(binary.NativeEndian.Uint32(v)))
		case typ == unix.RTA_PRIORITY:
			r.Metric = binary.NativeEndian.Uint32(v)
		case typ == unix.RTA_TABLE:
			table = binary.NativeEndian.Uint32(v)
		}
	}
	r.data = m.data
	return r, table == unix.RT_TABLE_MAIN
}

// AddDefaultRoute adds a default route by gateway through the interface,
// replacing one of the same metric. The gateway need not be in one of the
// interface's prefixes.
func (c *Conn) AddDefaultRoute(index int, gateway netip.Addr) error {
	b := []byte{
		family(gateway), 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST,
	}
	b = binary.NativeEndian.AppendUint32(b, unix.RTNH_F_ONLINK)
	b = attribute(b, unix.RTA_GATEWAY, gateway.AsSlice())
	b = attribute32(b, unix.RTA_OIF, uint32(index))
	if err := c.do(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, b); err != nil {
		return fmt.Errorf("add default route by %v: %w", gateway, err)
	}
	return nil
}

// DeleteRoute removes a route that DefaultRoutes has returned.
func (c *Conn) DeleteRoute(r Route) error {
	if err := c.do(unix.RTM_DELROUTE, 0, r.data); err != nil {
		return fmt.Errorf("remove default route by %v: %w", r.Gateway, err)
	}
	return nil
}

// FlushNeighbours forgets what the interface has learnt about its neighbours'
// hardware addresses.
func (c *Conn) FlushNeighbours(index int) error {
	list, err := c.dump(unix.RTM_GETNEIGH, make([]byte, unix.SizeofNdMsg))
	if err != nil {
		return fmt.Errorf("list neighbours: %w", err)
	}
	for _, m := range list {
		body, ok := neighbour(m, index)
		if !ok {
			continue
		}
		// It may have timed out meanwhile.
		if err := c.do(unix.RTM_DELNEIGH, 0, body); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove neighbour: %w", err)
		}
	}
	return nil
}

// neighbour returns the body of a request that removes the entry m, if it is a
// learnt one of the interface.
func neighbour(m message, index int) ([]byte, bool) {
	if m.kind != unix.RTM_NEWNEIGH || len(m.data) < unix.SizeofNdMsg {
		return nil, false
	}
	if int(int32(binary.NativeEndian.Uint32(m.data[4:]))) != index {
		return nil, false
	}
	if m.data[0] != unix.AF_INET && m.data[0] != unix.AF_INET6 {
		return nil, false
	}
	state := binary.NativeEndian.Uint16(m.data[8:])
	if state&(unix.NUD_PERMANENT|unix.NUD_NOARP) != 0 {
		return nil, false
	}
	for typ, v := range attributes(m.data[unix.SizeofNdMsg:]) {
		if typ == unix.NDA_DST {
			return attribute(append([]byte(nil), m.data[:unix.SizeofNdMsg]...), unix.NDA_DST, v), true
		}
	}
	return nil, false
}
