// Package usernet connects machines through QEMU's user networking (libslirp):
// every machine is alone in a network of its own, inside its QEMU process, and
// nothing exists on the host. It needs no rights.
//
// Addresses are the same in every machine: in subnet 10.0.2.0/24 the guest is
// 10.0.2.15, the gateway 10.0.2.2 and the name service 10.0.2.3, libslirp's
// defaults.
//
// # What a guest reaches
//
// Without AllowInternet: nothing (QEMU's restrict=on).
//
// With it, QEMU connects to whatever the guest asks for, as a process of this
// host: that would be the internet, but also the host's own services by
// the gateway's address (10.0.2.2 is the host's 127.0.0.1), the networks around
// the host, and a cloud's metadata service (169.254.169.254). libslirp can
// refuse the first (disable_host_loopback), but QEMU has never had an option for
// it (7.2 to 10.0). Therefore:
//
//   - Where every machine runs as a Unix user of its own (the daemon is root and
//     uid_base is not 0), an nftables table rejects what those users send to the
//     host itself or to addresses that are not public, except for name service
//     at the host's resolvers and the networks of Options.AllowPrivate. The
//     kernel knows a packet's user from its socket, so not even a QEMU that its
//     guest has taken over gets past. When the table cannot be written, Attach
//     fails: a guest gets no internet rather than the host.
//   - Where machines run as the daemon's own user, their traffic cannot be told
//     from that user's, and nothing is filtered. [Driver.Guarded] says which.
//
// The table is written anew, as one atomic script, at every Attach with
// AllowInternet, because other programs flush the whole ruleset; it costs one run of nft, 6 to
// 20 ms.
// It stays when the daemon ends, as the machines do; [Driver.Remove] removes it.
//
// Inbound there is nothing: ports of the guest are reached through the agent.
package usernet

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"

	"github.com/agentiso/agentiso/internal/cmdrun"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// driver is the name in [domain.NetworkSlot].
const driver = "user"

// Options are a Driver's settings.
type Options struct {
	Subnet netip.Prefix // IPv4, /8 to /27; the zero value is 10.0.2.0/24
	// DNS are the name servers of guests with internet access; empty is
	// libslirp's own, which asks the first of the host's.
	DNS []netip.Addr
	// AllowPrivate are networks that guests with internet access may reach
	// although they are not public.
	AllowPrivate []netip.Prefix
	// UIDBase and UIDCount are the users of machines; a count of 0 means that
	// they run as the daemon's own, and that nothing is filtered.
	UIDBase, UIDCount int

	ResolvConf string       // "" is /etc/resolv.conf
	Log        *slog.Logger // nil: none
}

// Driver gives machines their slots. Its methods may be called concurrently.
type Driver struct {
	opt   Options
	guard sync.Mutex // one nft at a time
	nft   func(ctx context.Context, script string) error
}

// New returns a driver. Nothing on the host is touched before a machine wants
// the internet.
func New(opt Options) (*Driver, error) {
	if !opt.Subnet.IsValid() {
		opt.Subnet = netip.MustParsePrefix("10.0.2.0/24")
	}
	if p := opt.Subnet; !p.Addr().Is4() || p.Bits() < 8 || p.Bits() > 27 || p != p.Masked() {
		return nil, fault.New(fault.Invalid, "network %s cannot be the guests' subnet", opt.Subnet).
			WithNext("Set network.subnet to an IPv4 network of /8 to /27, such as 10.0.2.0/24.")
	}
	if opt.ResolvConf == "" {
		opt.ResolvConf = "/etc/resolv.conf"
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	return &Driver{opt: opt, nft: runNFT}, nil
}

// Guarded reports whether guests with internet access are kept from the host
// and from private networks.
func (d *Driver) Guarded() bool { return d.opt.UIDCount > 0 }

// Attach makes a slot; see the contract in package network. It fails with a
// fault of kind missing when the machine would have to be guarded and cannot.
func (d *Driver) Attach(ctx context.Context, id string, policy domain.NetworkPolicy, prev domain.NetworkSlot) (domain.NetworkSlot, error) {
	subnet := d.opt.Subnet
	if prev.Driver == driver && prev.Address.IsValid() && prev.Address.Addr().Is4() {
		subnet = prev.Address.Masked()
	}
	mac := prev.MAC
	if !goodMAC(mac) {
		mac = newMAC()
	}
	slot := domain.NetworkSlot{
		Driver: driver, MAC: mac, Address: netip.PrefixFrom(nth(subnet, 15), subnet.Bits()), Restrict: !policy.AllowInternet,
	}
	if slot.Restrict {
		return slot, nil
	}
	if d.Guarded() {
		if err := d.writeGuard(ctx); err != nil {
			return domain.NetworkSlot{}, fmt.Errorf("attach %s: %w", id, err)
		}
	} else {
		d.opt.Log.Warn("guest can reach this host's own services and private networks", "workspace", id)
	}
	slot.Gateway = nth(subnet, 2)
	slot.DNS = d.opt.DNS
	if len(slot.DNS) == 0 {
		slot.DNS = []netip.Addr{nth(subnet, 3)}
	}
	return slot, nil
}

// Detach has nothing to give back.
func (d *Driver) Detach(context.Context, string, domain.NetworkSlot) error { return nil }

// List names nothing: slots exist inside QEMU processes only.
func (d *Driver) List(context.Context) ([]string, error) { return nil, nil }

// Remove removes the nftables table. Guests that have internet access are then
// no longer kept from the host: it is for when no machine runs.
func (d *Driver) Remove(ctx context.Context) error {
	if !d.Guarded() {
		return nil
	}
	d.guard.Lock()
	defer d.guard.Unlock()
	// Declared first, so that it can be deleted whether it exists or not.
	err := d.nft(ctx, "table inet "+table+"\ndelete table inet "+table+"\n")
	if errors.Is(err, exec.ErrNotFound) { // then it was never written either
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove nftables table %s: %w", table, err)
	}
	return nil
}

func (d *Driver) writeGuard(ctx context.Context) error {
	resolvers, err := readResolvers(d.opt.ResolvConf)
	if err != nil {
		return fmt.Errorf("read name servers: %w", err)
	}
	d.guard.Lock()
	defer d.guard.Unlock()
	err = d.nft(ctx, script(d.opt, append(resolvers, d.opt.DNS...)))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound):
		return fault.New(fault.Missing, "internet access needs nft, to keep the guest from this host's own services: %w", err).
			WithNext("Install the package nftables, or leave out --internet.")
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return fault.New(fault.Missing, "internet access needs nftables, to keep the guest from this host's own services: %w", err).
		WithNext("Give the daemon CAP_NET_ADMIN and a kernel with nftables, or leave out --internet.")
}

func runNFT(ctx context.Context, script string) error {
	return cmdrun.Stream(ctx, cmdrun.Command{Argv: []string{"nft", "-f", "-"}, Stdin: strings.NewReader(script)})
}

// nth returns the n-th address of an IPv4 network.
func nth(p netip.Prefix, n byte) netip.Addr {
	b := p.Masked().Addr().As4()
	b[3] += n // a network of at most /27 ends in 00000
	return netip.AddrFrom4(b)
}

// newMAC draws a unicast, locally administered address (IEEE 802: bit 0 of the
// first byte clear, bit 1 set).
func newMAC() string {
	m := make(net.HardwareAddr, 6)
	_, _ = rand.Read(m) // never fails
	m[0] = m[0]&^1 | 2
	return m.String()
}

func goodMAC(s string) bool {
	m, err := net.ParseMAC(s)
	return err == nil && len(m) == 6 && m[0]&3 == 2
}

// maxResolvers is how many name servers libc and libslirp look at.
const maxResolvers = 3

// readResolvers returns the host's name servers; none if there is no file.
func readResolvers(path string) ([]netip.Addr, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []netip.Addr
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" || len(all) == maxResolvers {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			all = append(all, a.WithZone(""))
		}
	}
	return all, nil
}
