package identity

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"strings"
	"time"

	"connectrpc.com/connect"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// Limits of a ConfigureRequest, as api/agentiso/guest/v1 has them.
const (
	maxHostname = 64 // HOST_NAME_MAX
	maxLabel    = 63
	maxDNS      = 8
	minSeed     = 32
	maxSeed     = 512
	maxEnv      = 1024
	maxEnvBytes = 1 << 20
	maxEnvEntry = 128<<10 - 1 // what execve(2) takes of one string
	maxWorkdir  = 4095
	maxToken    = 1024
	maxLinkKey  = 1024
	minMTU      = 576
	maxMTU      = 65535
)

// The years between which a wall clock is believed.
var (
	minClock = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	maxClock = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)
)

// FieldError is a part of a ConfigureRequest that is wrong or could not be
// applied.
type FieldError struct {
	Field string // its name in the protocol
	Err   error
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *FieldError) Unwrap() error { return e.Err }

func fieldErrorf(field, format string, args ...any) error {
	return &FieldError{field, fmt.Errorf(format, args...)}
}

// configureError words err for the wire.
func configureError(code connect.Code, err error) error {
	if errors.Is(err, errUnsuitable) {
		code = connect.CodeFailedPrecondition
	}
	cerr := connect.NewError(code, err)
	if f, ok := errors.AsType[*FieldError](err); ok {
		cerr.Meta().Set(FieldHeader, f.Field)
	}
	return cerr
}

// request is a checked ConfigureRequest. What was empty is zero.
type request struct {
	seed      []byte
	clock     time.Time
	mac       net.HardwareAddr
	mtu       uint32
	address   netip.Prefix
	gateway   netip.Addr
	dns       []netip.Addr
	hostname  string
	machineID string
	linkKey   []byte
	env       map[string]string
	user      string
	workdir   string
	token     string
	grow      bool
}

// parseRequest checks everything that can be checked without looking at the
// machine. The error is a *FieldError.
func parseRequest(m *guestv1.ConfigureRequest) (*request, error) {
	r := &request{
		seed: m.GetRandomSeed(), clock: time.Unix(0, m.GetWallClockUnixNs()), mtu: m.GetMtu(),
		hostname: m.GetHostname(), machineID: m.GetMachineId(), linkKey: m.GetLinkKey(), env: m.GetEnvironment(),
		user: m.GetDefaultUser(), workdir: m.GetDefaultWorkdir(), token: m.GetAccessToken(), grow: m.GetGrowRoot(),
	}
	if n := len(r.seed); n < minSeed || n > maxSeed {
		return nil, fieldErrorf("random_seed", "%d bytes, want %d to %d", n, minSeed, maxSeed)
	}
	if r.clock.Before(minClock) || r.clock.After(maxClock) {
		return nil, fieldErrorf("wall_clock_unix_ns", "%d is not between the years %d and %d", m.GetWallClockUnixNs(), minClock.Year(), maxClock.Year())
	}
	for _, check := range []func(*guestv1.ConfigureRequest) error{r.parseNetwork, r.checkNames, r.checkProcesses} {
		if err := check(m); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (r *request) parseNetwork(m *guestv1.ConfigureRequest) (err error) {
	if s := m.GetMac(); s != "" {
		r.mac, err = net.ParseMAC(s)
		zero := r.mac.String() == "00:00:00:00:00:00"
		if err != nil || len(r.mac) != 6 || r.mac[0]&1 != 0 || zero {
			return fieldErrorf("mac", "%.64q is not a 48 bit unicast address", s)
		}
	}
	if r.mtu != 0 && (r.mtu < minMTU || r.mtu > maxMTU) {
		return fieldErrorf("mtu", "%d is not between %d and %d", r.mtu, minMTU, maxMTU)
	}
	if s := m.GetAddress(); s != "" {
		if r.address, err = parseAddress(s); err != nil {
			return &FieldError{"address", err}
		}
	}
	if s := m.GetGateway(); s != "" {
		if r.gateway, err = parseHost(s); err != nil {
			return &FieldError{"gateway", err}
		}
		if a := r.address; a.IsValid() {
			switch {
			case r.gateway.Is4() != a.Addr().Is4():
				return fieldErrorf("gateway", "%v is not of the same family as address %v", r.gateway, a)
			case r.gateway == a.Addr():
				return fieldErrorf("gateway", "%v is the guest's own address", r.gateway)
			case !a.Contains(r.gateway) && !a.IsSingleIP() && !r.gateway.IsLinkLocalUnicast():
				return fieldErrorf("gateway", "%v is not in %v", r.gateway, a.Masked())
			}
		}
	}
	if n := len(m.GetDns()); n > maxDNS {
		return fieldErrorf("dns", "%d addresses, more than %d", n, maxDNS)
	}
	for i, s := range m.GetDns() {
		a, err := parseHost(s)
		if err != nil {
			return &FieldError{fmt.Sprintf("dns[%d]", i), err}
		}
		r.dns = append(r.dns, a)
	}
	return nil
}

// parseAddress parses the address of an interface in CIDR form.
func parseAddress(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf("%.64q is not an address in CIDR form such as 10.99.0.5/16", s)
	}
	a := p.Addr()
	switch {
	case a.Is4In6():
		return p, fmt.Errorf("%v is an IPv4 address in IPv6 form", p)
	case p.Bits() == 0 || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback():
		return p, fmt.Errorf("%v cannot be the address of an interface", p)
	case a.Is4() && p.Bits() < 31:
		first := p.Masked().Addr()
		last := lastAddress(p)
		if a == first || a == last {
			return p, fmt.Errorf("%v is the network or broadcast address of %v", a, p.Masked())
		}
	}
	return p, nil
}

// lastAddress is the last address of an IPv4 prefix.
func lastAddress(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	return netip.AddrFrom4(b)
}

// parseHost parses the address of another machine.
func parseHost(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() {
		return a, fmt.Errorf("%.64q is not the address of a machine", s)
	}
	return a, nil
}

func (r *request) checkNames(*guestv1.ConfigureRequest) error {
	if r.hostname != "" {
		if err := checkHostname(r.hostname); err != nil {
			return &FieldError{"hostname", err}
		}
	}
	if r.machineID != "" {
		const zero = "00000000000000000000000000000000"
		if len(r.machineID) != 32 || strings.Trim(r.machineID, "0123456789abcdef") != "" || r.machineID == zero {
			return fieldErrorf("machine_id", "%.64q is not 32 lower-case hexadecimal digits", r.machineID)
		}
	}
	if n := len(r.linkKey); n > maxLinkKey {
		return fieldErrorf("link_key", "%d bytes, more than %d", n, maxLinkKey)
	}
	return nil
}

// checkHostname checks a name by RFC 1123, section 2.1.
func checkHostname(s string) error {
	if len(s) > maxHostname {
		return fmt.Errorf("%d bytes, more than %d", len(s), maxHostname)
	}
	for label := range strings.SplitSeq(s, ".") {
		ok := label != "" && len(label) <= maxLabel && label[0] != '-' && label[len(label)-1] != '-'
		for _, c := range []byte(label) {
			ok = ok && (c == '-' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z')
		}
		if !ok {
			return fmt.Errorf("%q is not a host name (letters, digits and inner hyphens)", s)
		}
	}
	return nil
}

func (r *request) checkProcesses(*guestv1.ConfigureRequest) error {
	if n := len(r.env); n > maxEnv {
		return fieldErrorf("environment", "%d entries, more than %d", n, maxEnv)
	}
	size := 0
	for k, v := range r.env {
		size += len(k) + len(v) + 2
		switch {
		case k == "" || strings.ContainsAny(k, "=\x00"):
			return fieldErrorf("environment", "%.64q is not a name", k)
		case strings.ContainsRune(v, 0):
			return fieldErrorf("environment", "the value of %.64q holds a zero byte", k)
		case len(k)+1+len(v) > maxEnvEntry:
			return fieldErrorf("environment", "%.64q is longer than %d bytes", k, maxEnvEntry)
		}
	}
	if size > maxEnvBytes {
		return fieldErrorf("environment", "%d bytes, more than %d", size, maxEnvBytes)
	}
	if w := r.workdir; w != "" && (!path.IsAbs(w) || len(w) > maxWorkdir || strings.ContainsRune(w, 0)) {
		return fieldErrorf("default_workdir", "%.64q is not an absolute path", w)
	}
	if len(r.token) > maxToken {
		return fieldErrorf("access_token", "%d bytes, more than %d", len(r.token), maxToken)
	}
	for _, c := range []byte(r.token) {
		if c <= ' ' || c > '~' {
			return fieldErrorf("access_token", "holds a character that a header cannot carry")
		}
	}
	return nil
}

// checkGuest checks what depends on the guest's files.
func (r *request) checkGuest(accounts users.DB) error {
	if r.user == "" {
		return nil
	}
	if _, err := accounts.Lookup(r.user); err != nil {
		return fieldErrorf("default_user", "%w: %w", errUnsuitable, err)
	}
	return nil
}
