// Package network says what every network driver promises. The drivers are its
// subpackages; package workspace declares the interface (Networks), and
// cmd/agentiso joins the two. No logic is here.
//
// # Contract
//
// A driver makes the place of one machine on a network before its QEMU starts:
// virtio-mmio has no hot-plug, so each machine has its one NIC from the start,
// also the one that may reach nothing.
//
//   - Attach is given the id, the policy and the slot that the workspace had
//     before, or the zero slot. It returns the same MAC and address for as long
//     as the configuration allows, because the guest has both in its memory and
//     its files.
//   - A MAC is unicast and locally administered, and unique on the host with
//     overwhelming probability: it is random.
//   - Without AllowInternet nothing passes: no internet, no other workspace, no
//     service of the host. The slot then has neither gateway nor name servers,
//     so that a guest is told "network is unreachable" at once instead of
//     waiting for answers that cannot come.
//   - With AllowInternet the internet can be reached. What else can is the
//     driver's to document; a driver that promises to keep guests from the host
//     fails Attach when it cannot keep that promise.
//   - Detach gives back what Attach took on the host; what is absent is no error.
//     A failed Attach may leave something, which Detach clears.
//   - List names the ids that hold anything on the host, for sweeping.
//
// # Drivers
//
// usernet is QEMU's own user networking: nothing of a machine's network exists
// on the host. The bridge driver, an issue of its own, gives each machine a TAP
// on a bridge, an address of a common subnet and a place in nftables sets; it
// fits the same three verbs, with domain.NetworkSlot.TAP naming the interface.
package network
